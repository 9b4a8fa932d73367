"""Benchmarks of an engine on one process, without services: `scission bench decode|prefill`."""
