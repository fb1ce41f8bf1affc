"""Meshes and sharding rules, hosts and their rendezvous, preemption, heartbeat files."""
