"""The decode service: takes a prompt's state in and generates its tokens, many requests a step.

`engine` is the loop; `admission` decides who gets room, `arrival` turns arrived state into running
sequences, `scheduler` picks what a step computes, `outbox` gathers what it has to tell.
"""
