"""The functions of the code base `mamba-peft`, which this package replaces, with their signatures
and return shapes, over the adapters and the loop."""
