"""A file for each command of `fcmae`: knows arguments and printing; what it computes is imported when it runs."""
