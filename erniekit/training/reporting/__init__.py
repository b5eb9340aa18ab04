"""What a run tells its user while it trains and leaves behind: one small file a kind of report."""
