"""Which requests run in the next step: pure policy, one code for the server and the simulator."""
