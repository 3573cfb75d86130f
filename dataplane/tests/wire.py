"""The far ends of the veth pairs in xsk.rs, as packet sockets: Linux vouches for what they see.

Reads one command a line: `send IFACE HEX`, or `seen IFACE SECONDS`, which waits that long for a
frame and answers with all that came in since the last time, in hex, and a blank line.
It decides nothing.
"""

import select
import socket
import sys

OUTGOING = 4  # PACKET_OUTGOING: our own, looped back
sockets = {}


def at(interface):
    if interface not in sockets:
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        wire.bind((interface, 0))
        sockets[interface] = wire
    return sockets[interface]


def frames(wire, patience):
    while select.select([wire], [], [], patience)[0]:
        data, source = wire.recvfrom(65536)
        if source[2] != OUTGOING:
            yield data.hex()
            patience = 0.02


for interface in sys.argv[1:]:
    at(interface)
print("ready", flush=True)
for line in sys.stdin:
    command, interface, argument = line.split()
    if command == "send":
        at(interface).send(bytes.fromhex(argument))
        print("sent", flush=True)
    else:
        print("\n".join([*frames(at(interface), float(argument)), ""]), flush=True)
