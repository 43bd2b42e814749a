//! The Lease, simulated: seeded runs of several candidates with clocks that go wrong, calls that are lost, late or never come
//! back, and holders that die. Never two of them hold it at once, and a quiet server keeps its holder.

use std::collections::BinaryHeap;

use rand::RngExt as _;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::*;

/// What travels between candidates and the server, in the order of true time.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Turn { of: usize, life: u32 },
    Arrives { of: usize, life: u32, call: usize },
    Answers { of: usize, life: u32, call: usize },
    GivesUp { of: usize, life: u32, call: usize },
}

struct Candidate {
    elector: Elector,
    life: u32,
    /// Its clock: an offset, and how fast it runs in thousandths.
    offset: Duration,
    rate: u32,
}

impl Candidate {
    fn clock(&self, at: Duration) -> Duration {
        self.offset + at * self.rate / 1000
    }
}

struct Call {
    action: Action,
    /// By the caller's clock.
    sent: Duration,
    answer: Option<Answer>,
    /// The caller has it, or gave up.
    over: bool,
}

struct Sim {
    rng: StdRng,
    queue: BinaryHeap<(std::cmp::Reverse<Duration>, u64, Event)>,
    next: u64,
    candidates: Vec<Candidate>,
    calls: Vec<Call>,
    stored: Option<Record>,
    version: u64,
    /// Nothing reaches the server.
    outage: bool,
}

impl Sim {
    fn new(seed: u64, candidates: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let candidates = (0..candidates)
            .map(|at| Candidate {
                elector: Elector::new(format!("{at}-0")),
                life: 0,
                offset: Duration::from_millis(rng.random_range(0..100_000_000)),
                rate: rng.random_range(950..=1050),
            })
            .collect();
        let mut sim = Self {
            rng,
            queue: BinaryHeap::new(),
            next: 0,
            candidates,
            calls: Vec::new(),
            stored: None,
            version: 0,
            outage: false,
        };
        for of in 0..sim.candidates.len() {
            sim.push(Duration::ZERO, Event::Turn { of, life: 0 });
        }
        sim
    }

    fn push(&mut self, at: Duration, event: Event) {
        self.next += 1;
        self.queue.push((std::cmp::Reverse(at), u64::MAX - self.next, event));
    }

    fn delay(&mut self) -> Duration {
        // Mostly quick; sometimes as long as a lease.
        let most = if self.rng.random_bool(0.1) { 30_000 } else { 200 };
        Duration::from_millis(self.rng.random_range(1..most))
    }

    fn serve(&mut self, action: &Action) -> Answer {
        let holder = match action {
            Action::Read => return self.stored.clone().map_or(Answer::Absent, Answer::Is),
            Action::Create if self.stored.is_some() => return Answer::Conflict,
            Action::Create => None,
            Action::Write(record) => match &self.stored {
                None => return Answer::Absent,
                Some(stored) if stored.version != record.version => return Answer::Conflict,
                Some(_) => Some(record.clone()),
            },
        };
        self.version += 1;
        let record = holder.unwrap_or_else(|| Record { holder: String::new(), version: String::new(), transitions: 0 });
        self.stored = Some(Record { version: self.version.to_string(), ..record });
        self.stored.clone().map_or(Answer::Absent, Answer::Is)
    }

    fn handle(&mut self, at: Duration, event: Event) {
        match event {
            Event::Turn { of, life } => self.turn(at, of, life),
            Event::Arrives { of, life, call } => {
                if self.outage || self.rng.random_bool(0.05) {
                    return;
                }
                let action = self.calls[call].action.clone();
                let mut answer = self.serve(&action);
                if action == Action::Create && answer != Answer::Conflict {
                    let holder = format!("{of}-{life}");
                    if let Some(stored) = &mut self.stored {
                        stored.holder = holder;
                        answer = Answer::Is(stored.clone());
                    }
                }
                self.calls[call].answer = Some(answer);
                // Some answers are lost.
                if !self.rng.random_bool(0.05) {
                    let after = self.delay();
                    self.push(at + after, Event::Answers { of, life, call });
                }
            }
            Event::Answers { of, life, call } => {
                let candidate = &mut self.candidates[of];
                let (now, sent) = (candidate.clock(at), self.calls[call].sent);
                // Answers that come after the caller gave up are not read.
                if candidate.life != life || self.calls[call].over {
                    return;
                }
                self.calls[call].over = true;
                let answer = self.calls[call].answer.clone().unwrap();
                candidate.elector.answered(&self.calls[call].action.clone(), sent, now, answer);
                self.push(at, Event::Turn { of, life });
            }
            Event::GivesUp { of, life, call } => {
                let candidate = &mut self.candidates[of];
                let (now, sent) = (candidate.clock(at), self.calls[call].sent);
                if candidate.life != life || self.calls[call].over {
                    return;
                }
                self.calls[call].over = true;
                candidate.elector.answered(&self.calls[call].action.clone(), sent, now, Answer::Failed);
                self.push(at, Event::Turn { of, life });
            }
        }
    }

    fn turn(&mut self, at: Duration, of: usize, life: u32) {
        let candidate = &self.candidates[of];
        if candidate.life != life {
            return;
        }
        let now = candidate.clock(at);
        match candidate.elector.step(now) {
            Err(wait) => {
                let then = at + wait * 1000 / candidate.rate + Duration::from_millis(1);
                self.push(then, Event::Turn { of, life });
            }
            Ok(action) => {
                self.calls.push(Call { action: action.clone(), sent: now, answer: None, over: false });
                let (call, after) = (self.calls.len() - 1, self.delay());
                self.push(at + after, Event::Arrives { of, life, call });
                self.push(at + Duration::from_secs(3), Event::GivesUp { of, life, call });
            }
        }
    }

    fn holders(&self, at: Duration) -> Vec<usize> {
        let holds = |candidate: &Candidate| candidate.elector.held_until(candidate.clock(at)).is_some();
        (0..self.candidates.len()).filter(|of| holds(&self.candidates[*of])).collect()
    }

    /// A process ends without a word, and another begins in its place.
    fn crash(&mut self, at: Duration, of: usize) {
        let candidate = &mut self.candidates[of];
        candidate.life += 1;
        let life = candidate.life;
        candidate.elector = Elector::new(format!("{of}-{life}"));
        self.push(at, Event::Turn { of, life });
    }
}

#[test]
fn never_do_two_hold_it_whatever_is_lost_or_late() {
    let mut terms = 0;
    for seed in 0..300 {
        let candidates = 2 + (seed % 2) as usize;
        let mut sim = Sim::new(seed, candidates);
        let mut last: Vec<usize> = Vec::new();
        let end = Duration::from_secs(1200);
        while let Some((std::cmp::Reverse(at), _, event)) = sim.queue.pop() {
            if at > end {
                break;
            }
            // After every event, and just before it: holding ends by itself in between.
            for moment in [at.saturating_sub(Duration::from_millis(1)), at] {
                let holders = sim.holders(moment);
                assert!(holders.len() <= 1, "seed {seed}: {holders:?} hold it at {moment:?}");
            }
            sim.handle(at, event);
            let holders = sim.holders(at);
            assert!(holders.len() <= 1, "seed {seed}: {holders:?} hold it at {at:?}");
            if holders != last {
                terms += usize::from(!holders.is_empty());
                last = holders.clone();
            }
            if sim.rng.random_bool(0.002) {
                let of = sim.rng.random_range(0..candidates);
                sim.crash(at, of);
            }
            if sim.rng.random_bool(0.002) {
                sim.outage = !sim.outage;
            }
        }
    }
    assert!(terms > 500, "they were held: {terms} terms");
}

#[test]
fn a_quiet_server_has_one_holder_who_keeps_it() {
    let mut sim = Sim::new(1, 2);
    sim.rng = StdRng::seed_from_u64(1);
    let (mut now, mut elector) = (Duration::from_secs(1000), Elector::new("a".into()));
    let mut writes = 0;
    while now < Duration::from_secs(1600) {
        match elector.step(now) {
            Err(wait) => now += wait,
            Ok(action) => {
                writes += usize::from(action != Action::Read);
                let mut answer = sim.serve(&action);
                if action == Action::Create
                    && let Some(stored) = &mut sim.stored
                {
                    stored.holder = "a".into();
                    answer = Answer::Is(stored.clone());
                }
                elector.answered(&action, now, now + Duration::from_millis(10), answer);
                assert!(writes == 0 || elector.held_until(now).is_some(), "held at {now:?}");
            }
        }
    }
    assert!((115..=125).contains(&writes), "one each five seconds: {writes}");
    assert_eq!(sim.stored.unwrap().transitions, 0, "it never changed hands");
}

#[test]
fn a_released_lease_is_taken_at_once_and_a_silent_one_after_its_time() {
    let at = Duration::from_secs;
    let of = |holder: &str, version: &str| Record { holder: holder.into(), version: version.into(), transitions: 3 };
    let mut elector = Elector::new("b".into());
    assert_eq!(elector.step(at(100)), Ok(Action::Read));
    elector.answered(&Action::Read, at(100), at(100), Answer::Is(of("a", "7")));
    assert_eq!(elector.step(at(100)), Err(LOOK));
    elector.answered(&Action::Read, at(114), at(114), Answer::Is(of("a", "7")));
    assert_eq!(elector.step(at(116)), Ok(Action::Write(Record { transitions: 4, ..of("b", "7") })), "seen at 100");
    // A change begins the time anew.
    elector.answered(&Action::Read, at(114), at(114), Answer::Is(of("a", "8")));
    assert_eq!(elector.step(at(128)), Ok(Action::Read));
    elector.answered(&Action::Read, at(118), at(118), Answer::Is(of("", "9")));
    let take = Action::Write(Record { transitions: 4, ..of("b", "9") });
    assert_eq!(elector.step(at(118)), Ok(take.clone()), "nobody has it");
    elector.answered(&take, at(118), at(121), Answer::Is(of("b", "10")));
    assert_eq!(elector.held_until(at(127)), Some(at(128)), "from when it was sent");
    assert_eq!(elector.held_until(at(128)), None);
    assert_eq!(elector.release(at(122)), Some(of("", "10")));
    assert_eq!(elector.held_until(at(122)), None, "before anybody hears of it");
    assert_eq!(elector.release(at(122)), None);
}
