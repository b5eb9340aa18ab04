"""A job of many processes: how it is started on one host or many, watched, ended, and started again. No Paddle here."""
