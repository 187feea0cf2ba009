// pm2 start deploy/ecosystem.config.cjs — see deploy/README.md
const path = require("path");

const root = path.resolve(__dirname, "..");
const config = path.resolve(process.env.RATCHET_CONFIG || path.join(root, "ratchet-home", "ratchet.toml"));

module.exports = {
  apps: [
    {
      name: "ratchet",
      script: path.join(root, ".venv/bin/ratchet"),
      args: ["up", "--config", config],
      cwd: path.dirname(config),
      interpreter: "none",
      autorestart: true,
      exp_backoff_restart_delay: 200,
      // pm2 sends SIGINT and kills after 1.6 s; Ratchet finishes its batch and lets the trainer write a checkpoint, which takes up to 30 s.
      kill_timeout: 35000,
      // Only the daemon is told to stop: it lets its trainer write a checkpoint.
      treekill: false,
      max_restarts: 1000,
      min_uptime: 5000,
      merge_logs: true,
      time: false,
    },
  ],
};
