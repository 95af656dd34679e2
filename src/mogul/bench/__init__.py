"""Measures: the demo, real models for measuring, the ledger."""
