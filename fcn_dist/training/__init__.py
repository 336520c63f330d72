"""DeepSpeed: engine, checkpoints and the loop."""
