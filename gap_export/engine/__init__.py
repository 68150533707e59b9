"""Graphs to TensorRT and TensorRT-RTX engines: profiles, building, inspection, and what the libraries' messages mean.

library.py    which library a target needs, and the one log its messages arrive in
profiles.py   optimisation profiles of a graph, and which one serves a call
build.py      `engine_from_graph`: parse, check, build, write
isolated.py   the same in a process of its own, `builder_process.py`, which a builder may crash
messages.py   the one place where TensorRT's messages become an `EngineError`
inspect.py    facts about an engine, and whether it fits this library and this graph
device.py     the few CUDA runtime calls that a session needs
"""
