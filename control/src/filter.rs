//! Words of classic BPF, as in linux/bpf_common.h: what sockets' filters are made of.

/// Takes as many bytes of the packet as its operand says; 0 refuses it.
pub const RETURN: u16 = 0x06;
/// Loads the 32 bits at its operand.
pub const LOAD_WORD: u16 = 0x20;
/// Loads the byte at its operand.
pub const LOAD_BYTE: u16 = 0x30;
/// Loads the 16 bits at its operand.
pub const LOAD_HALF: u16 = 0x28;
/// Loads the byte at its operand, counted from X.
pub const LOAD_BYTE_AFTER_X: u16 = 0x50;
/// Loads the 16 bits at its operand, counted from X.
pub const LOAD_HALF_AFTER_X: u16 = 0x48;
/// Sets X to the length of the IPv4 header at its operand.
pub const X_IS_IPV4_HEADER_LEN: u16 = 0xb1;
/// Goes one of two ways, by whether what was loaded is its operand.
pub const JUMP_IF_EQUAL: u16 = 0x15;
