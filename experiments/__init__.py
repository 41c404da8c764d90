"""The paper's tables and figures: rows as data (tables.py), how they run (stages.py), what comes of it (report.py)."""
