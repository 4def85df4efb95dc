"""Servers beside other servers: throughput and latencies against concurrency, in equal memory, and what each door costs."""
