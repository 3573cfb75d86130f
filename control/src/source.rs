//! Where desired state comes from. A source knows no other source and nothing of what is made of
//! its state; it says what is wanted now, each time that changes.

pub mod api;
pub mod file;
pub mod swarm;
