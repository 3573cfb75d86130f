//! Full NAT: the client speaks to a VIP, the task to one of this node's mesh addresses.

mod slots;
pub mod translate;

pub use slots::{
    Connection, Id, MAX_BANKS, Plain, Side, Slots, State, Sums, Sweep, Timeouts, ToClient, ToTask,
    Way,
};
