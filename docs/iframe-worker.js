// Browsers start no worker from file://. There the search runs in a hidden frame instead, with a worker's two channels.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      this.waiting = []
      frame.addEventListener("load", () => {
        const inside = frame.contentWindow
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
        const script = inside.document.createElement("script")
        script.src = url
        script.onload = () => {
          this.send = data => inside.dispatchEvent(new MessageEvent("message", {data}))
          this.waiting.splice(0).forEach(this.send)
        }
        inside.document.body.append(script)
      }, {once: true})
      document.body.append(frame)
    }

    postMessage(data) {
      this.send ? this.send(data) : this.waiting.push(data)
    }
  }
}
