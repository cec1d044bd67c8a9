"""A registry in etcd (3.4 to 3.7), through its JSON gateway. Only agents use it; engines and proxies never do."""
