"""The process and its machine: global random states, files and locks, memory."""
