"""Speed and quality figures, printed as tables; not tests."""
