//! Tables for each pure function of routing.
