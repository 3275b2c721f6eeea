"""The support matrix: every PEFT method on every family, in fp32 and bf16, check by check."""
