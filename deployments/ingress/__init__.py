"""HTTP: routes, errors and limits."""
