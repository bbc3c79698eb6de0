import type { Metadata } from "next";
import type { ReactNode } from "react";
import "./shop.css";

export const metadata: Metadata = { title: "Talk to us · Corner Shop", icons: "data:," };

export default function Layout({ children }: { children: ReactNode }) {
  return <html lang="en"><body>{children}</body></html>;
}
