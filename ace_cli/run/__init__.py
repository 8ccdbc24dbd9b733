"""One run: its configuration, plan and journal, and the pipeline that tells its story."""
