"""The demo: three acts on one real model, a page and a JSON file. `run.run_demo` is the door."""
