//! What makes this node's own clients and own tasks those of the mesh, too: a link of our own, by which
//! they reach the workers like anyone else.

mod namespace;
mod pair;

pub use self::{
    namespace::Namespace,
    pair::{FAR_ADDRESS, FAR_INTERFACE, LocalLink, LocalLinkError, NODE_ADDRESS, NODE_MAC},
};
