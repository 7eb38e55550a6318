"""rtdmd: few-step generators from flow models on one workstation GPU."""

__version__ = "0.1.0"
