"""Runs on machines: sweeps, pods, queues."""
