//! Malformed resources, one by one: each gives a sentence that says what is wrong, and none takes the process down.
//!
//! The tables are the list of promises; a new check gets a row.
