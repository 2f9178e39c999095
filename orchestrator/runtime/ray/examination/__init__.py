"""What `orchestrator doctor` does with Ray: finding a cluster, asking each of its nodes, leaving nothing behind."""
