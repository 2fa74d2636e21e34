"""A module with a Model that no node includes: importing it leaves a trace."""

from stock import write

from mpworker import Model

write("hidden imported")


class Secret(Model):
    def runnable(self):
        write("hidden ran")
