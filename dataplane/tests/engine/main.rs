//! The engine, tested from outside: packets in, packets and counters out.
//!
//! Packets are built and judged by etherparse, never by the code under test.

mod answers;
mod connections;
mod encap;
mod hostile;
mod nat;
mod packets;
mod parse;
mod reference;
mod rig;
mod scheduling;
mod script;
mod selection;
mod turn;
