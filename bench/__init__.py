"""What sandbatch costs, measured: a launch, many sandboxes, and the same with podman. Raw rows are kept."""
