"""overnight retrains a team's text models every night and promotes a version only when it is really better."""

__version__ = "0.1.0"
