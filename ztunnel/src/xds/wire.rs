//! Looks for protobuf fields that this program does not know.
//!
//! The generated decoder skips them, which is right for a workload and wrong for a policy: an attribute that was skipped
//! widens an ALLOW. So a policy's bytes are walked once more against the field numbers that are known, and the path of
//! every message with an unknown field is given. Limits: the walk is as deep as the schema, and it gives at most
//! [`MAX_FINDINGS`] paths. It does not validate: the decoder has accepted the bytes before.

/// More than a policy of any size that people write has rules.
const MAX_FINDINGS: usize = 10_000;

/// Field numbers of a message, and the messages among them.
pub(super) struct Schema {
    pub(super) scalars: &'static [u32],
    pub(super) messages: &'static [(u32, &'static Self)],
}

/// Where an unknown field is: pairs of field number and index among that field's occurrences, from the outermost.
pub(super) type Path = Vec<(u32, usize)>;

/// Paths of the messages that have an unknown field; the empty path is the message itself. `None`: the bytes are no
/// protobuf, or there are too many findings.
pub(super) fn unknown_fields(bytes: &[u8], schema: &Schema) -> Option<Vec<Path>> {
    let mut found = Vec::new();
    walk(bytes, schema, &mut Vec::new(), &mut found)?;
    Some(found)
}

fn walk(mut bytes: &[u8], schema: &Schema, path: &mut Path, found: &mut Vec<Path>) -> Option<()> {
    let mut seen = std::collections::BTreeMap::<u32, usize>::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let number = u32::try_from(key >> 3).ok()?;
        let mut content: &[u8] = &[];
        match key & 7 {
            0 => {
                varint(&mut bytes)?;
            }
            1 => take(&mut bytes, 8).map(|_| ())?,
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                content = take(&mut bytes, length)?;
            }
            5 => take(&mut bytes, 4).map(|_| ())?,
            // Groups have not been written for fifteen years; a policy with one is not understood.
            _ => return None,
        }
        if let Some((_, inner)) = schema.messages.iter().find(|(known, _)| *known == number) {
            let index = seen.entry(number).or_default();
            path.push((number, *index));
            *index += 1;
            walk(content, inner, path, found)?;
            path.pop();
        } else if !schema.scalars.contains(&number) && found.last() != Some(path) {
            found.push(path.clone());
            if found.len() > MAX_FINDINGS {
                return None;
            }
        }
    }
    Some(())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..70).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f).checked_shl(shift).unwrap_or(0);
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INNER: Schema = Schema { scalars: &[1], messages: &[] };
    const OUTER: Schema = Schema { scalars: &[1], messages: &[(2, &INNER)] };

    #[test]
    fn unknown_fields_are_found_where_they_are() {
        type Case = (&'static str, &'static [u8], Option<Vec<Path>>);
        let cases: &[Case] = &[
            ("nothing", &[], Some(vec![])),
            ("a known scalar", &[0x08, 0x01], Some(vec![])),
            ("an unknown varint", &[0x18, 0x01], Some(vec![vec![]])),
            ("an unknown fixed64", &[0x19, 0, 0, 0, 0, 0, 0, 0, 0], Some(vec![vec![]])),
            ("an unknown fixed32", &[0x1d, 0, 0, 0, 0], Some(vec![vec![]])),
            ("two unknown ones, one finding", &[0x18, 1, 0x20, 1], Some(vec![vec![]])),
            ("in the second inner message", &[0x12, 2, 0x08, 1, 0x12, 2, 0x18, 1], Some(vec![vec![(2, 1)]])),
            ("a length beyond the end", &[0x12, 9, 0], None),
            ("a varint without end", &[0x08, 0xff, 0xff], None),
            ("a varint that is too long", &[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1], None),
            ("a group", &[0x0b, 0x0c], None),
        ];
        for (name, bytes, expected) in cases {
            assert_eq!(unknown_fields(bytes, &OUTER), *expected, "{name}");
        }
    }
}
