"""Reports during a run and after it, with one small module for each kind of report."""
