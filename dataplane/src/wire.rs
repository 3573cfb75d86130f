//! Header views, one file each: they mirror the RFC's drawing and judge nothing. And the checksum
//! that most of them carry.

pub mod arp;
pub mod checksum;
pub mod ethernet;
pub mod icmp;
pub mod ipv4;
pub mod ipv6;
pub mod tcp;
pub mod udp;
pub mod vxlan;
