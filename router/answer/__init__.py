"""How a query is answered: the query's life without a transport, turns, packets, certificates, the service."""
