"""Fine-tune GLA, Mamba-1 and Mamba-2 language models. Importing this loads no torch."""

__version__ = "0.1.0"
