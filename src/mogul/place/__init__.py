"""Expert -> device: pure numpy on the numbers of a trace; HiGHS only for certificates."""
