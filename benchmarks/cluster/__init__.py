"""How a cluster grows: what each part costs with 64 to 10,000 engines, in virtual time and on a real etcd."""
