"""What runs beside Ray on every node, and drains it when it is told that the node goes away."""
