"""Tenants over HTTP: a service that Tinker's client trains against, on one deployment of a plan."""
