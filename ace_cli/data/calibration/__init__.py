"""Where calibration windows come from, one file per source."""
