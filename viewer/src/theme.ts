/** Dark or light: the system's choice, or the reader's, which is remembered. */
import { useEffect, useState } from "preact/hooks";

export type Theme = "system" | "light" | "dark";

const KEY = "roentgen-theme";

function remembered(): Theme {
  try {
    const found = localStorage.getItem(KEY);
    return found === "light" || found === "dark" ? found : "system";
  } catch {
    return "system"; // a browser that keeps nothing
  }
}

let theme: Theme = remembered();

function apply(): void {
  if (theme === "system") delete document.documentElement.dataset["theme"];
  else document.documentElement.dataset["theme"] = theme;
}

apply();

/** Whether what is shown is dark. */
export function isDark(): boolean {
  return theme === "dark" || (theme === "system" && matchMedia("(prefers-color-scheme: dark)").matches);
}

export function setTheme(next: Theme): void {
  theme = next;
  try {
    if (next === "system") localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, next);
  } catch {
    // It holds until the page is left.
  }
  apply();
  dispatchEvent(new Event("themechange"));
}

/** Switch between dark and light. */
export function toggleTheme(): void {
  setTheme(isDark() ? "light" : "dark");
}

/** Whether what is shown is dark, as state: what is drawn on a canvas has to be drawn again. */
export function useDark(): boolean {
  const [dark, setDark] = useState(isDark());
  useEffect(() => {
    const media = matchMedia("(prefers-color-scheme: dark)");
    const listen = () => setDark(isDark());
    media.addEventListener("change", listen);
    addEventListener("themechange", listen);
    return () => {
      media.removeEventListener("change", listen);
      removeEventListener("themechange", listen);
    };
  }, []);
  return dark;
}
