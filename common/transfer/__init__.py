"""The hand-off of a request's state from a prefill to a decode, over ZeroMQ.

`sender` is the prefill's end, `receiver` the decode's; `events` is what both tell their engine
threads, `options` what they are configured with. `wire` packs messages, `plan` cuts state into
chunks, `arena` holds the receiver's slots, `sockets` opens every socket. `bench` measures it.
"""
