"""What the fuzzer throws, and where it is let loose."""
