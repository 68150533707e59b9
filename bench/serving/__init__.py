"""What `bench/serve.py` measures a server with: clients, requests whose answers are known, processes, and the parts of the measurement."""
