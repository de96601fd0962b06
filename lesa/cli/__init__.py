"""The command `lesa`: options in main, what they do in commands.

May import everything; nothing imports it.
"""
