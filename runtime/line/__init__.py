"""Inspection at the line: frames in, verdicts out that are never lost, evidence kept."""
