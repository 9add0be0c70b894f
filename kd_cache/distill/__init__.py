"""A student from rows: losses, fusion of teachers, and what they and hard labels make together.

Importing this imports no torch; what needs it is imported when it is first used.
"""
